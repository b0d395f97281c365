"""Run log, tables, plots and pages."""
