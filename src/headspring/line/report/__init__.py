"""The report: one HTML file that shows a run to the person who made it.

It reads what the stages left in the run folder and computes nothing about the model, so it can be written again at any
time and for a run that stopped half-way. The file stands alone: no script, no link that loads anything, and a content
security policy that forbids both. All text from models and documents is untrusted and passes through Jinja's
autoescape. Pages that react to the pointer would need a script; tooltips and folded details are all there is here.
"""

from headspring.line.report.page import write_report

__all__ = ["write_report"]
