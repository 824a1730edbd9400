"""The procedures that come with the package: importing this enters them."""

from __future__ import annotations

from deltatune.study.procedures import cost as cost
from deltatune.study.procedures import elsewhere as elsewhere
from deltatune.study.procedures import ensemble as ensemble
from deltatune.study.procedures import movement as movement
from deltatune.study.procedures import several as several
from deltatune.study.procedures import stack as stack
from deltatune.study.procedures import stages as stages
from deltatune.study.procedures import stream as stream
from deltatune.study.procedures import templates as templates
from deltatune.study.procedures import train as train
from deltatune.study.procedures import untrained as untrained
from deltatune.study.procedures import write as write
