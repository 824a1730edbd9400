"""What every registered method must keep on every architecture of ``tests.models``; see ``cells``."""
