"""How trials are carried out, by name: experiments enter their own, and plug-ins through entry points ``deltatune.procedures``."""

from __future__ import annotations

from deltatune.study.procedures.procedure import Procedure as Procedure
from deltatune.study.procedures.procedure import procedures as procedures
