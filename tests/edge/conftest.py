"""Makes `edge.planning` importable before tests of the report import what uses it."""

from tests.report_fakes import install_plan

install_plan()
