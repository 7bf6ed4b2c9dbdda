"""What a run says about itself: one HTML file that loads nothing from anywhere."""

from zsq_ext.report.page import FILE, write, write_report
from zsq_ext.report.result import Accuracy

__all__ = ["FILE", "Accuracy", "write", "write_report"]
