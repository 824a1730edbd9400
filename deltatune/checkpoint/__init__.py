"""Delta files: one format for every method, strict, safe, byte-stable and written whole or not at all."""

from __future__ import annotations

from deltatune.checkpoint.adapters import AdaptersFormat as AdaptersFormat
from deltatune.checkpoint.fingerprint import Fingerprint as Fingerprint
from deltatune.checkpoint.fingerprint import fingerprint as fingerprint
from deltatune.checkpoint.folder import replacing as replacing
from deltatune.checkpoint.format import load as load
from deltatune.checkpoint.format import read as read
from deltatune.checkpoint.format import save as save
from deltatune.checkpoint.opendelta import OpenDeltaFormat as OpenDeltaFormat
from deltatune.checkpoint.peft import PeftFormat as PeftFormat
from deltatune.checkpoint.record import Record as Record

__all__ = ["AdaptersFormat", "Fingerprint", "OpenDeltaFormat", "PeftFormat", "Record", "fingerprint", "load", "read", "replacing", "save"]
