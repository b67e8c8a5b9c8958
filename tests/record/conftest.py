from tests.recording import make_record, no_runner

__all__ = ["make_record", "no_runner"]
