"""Weights in whole numbers: how they are found, put into a model, saved, and what they cost in quality.

scheme         what is wanted          targets        which parameters
rounding, gptq   a matrix               quantize       a model
installing     into packed products    folder         on disk
reading        when a model is loaded  report         what changed
calibration    the text to measure by  choice         which products run
"""
