"""What a run says about itself: one HTML file that loads nothing from anywhere."""

from zsq_ext.report.page import FILE, Accuracy, write, write_report

__all__ = ["FILE", "Accuracy", "write", "write_report"]
