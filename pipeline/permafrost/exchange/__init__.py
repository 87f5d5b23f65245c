"""Targets of other tools that come in, and passes that go out without their images."""
