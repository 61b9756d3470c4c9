"""Log-ins through an identity provider: OpenID Connect Core 1.0, the authorization code flow, and bearer tokens."""
