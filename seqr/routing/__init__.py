"""Which adapter shapes which token: features and scores, the two routers, and the plain reference of both."""
