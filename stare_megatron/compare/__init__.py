"""Runs side by side: an HTML report, PNGs and a JSON file, from run folders.

load       run folders -> `Run`                          group     runs that differ only in their seed; settings apart
align      axes, moving average, mean over seeds         stats     the entropy band; mean and spread
derived    units, series worked out of logged ones       measures  the table
panels     what is drawn                                 samples   trajectories to read
html, png  the outputs (with report.html, .css, .js)     report    all of it, for the command line
watch      the report of one run, served while it grows (with watch.html)
"""
