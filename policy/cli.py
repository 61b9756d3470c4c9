"""seqr policy: who may use which silo, from a terminal beside the policy database."""

from __future__ import annotations

from policy.commands import access, ask, keys, limits, people, records
from policy.commands.common import group

app = group("Who may use which silo: users, groups, grants, keys, and the record of every change.")
app.command("init")(keys.init)
app.command("upgrade")(keys.upgrade_schema)
app.add_typer(people.user_app, name="user")
app.add_typer(people.group_app, name="group")
app.add_typer(access.silo_app, name="silo")
app.command("grant")(access.grant)
app.command("revoke")(access.revoke)
app.command("grants")(access.grants)
app.add_typer(keys.key_app, name="key")
app.add_typer(limits.limits_app, name="limits")
app.command("permitted")(ask.permitted)
app.command("check")(ask.check)
app.command("explain")(ask.explain)
app.add_typer(records.audit_app, name="audit")
app.command("export")(records.export)
app.command("load")(records.load)
app.command("test")(records.test)
