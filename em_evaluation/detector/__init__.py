"""A small detector of defects that is trained on labelled images.

It measures how well generated images follow their labels (`em_evaluation.adherence`) and what they
add to real labelled micrographs (`em_evaluation.detector_gain`).
"""
