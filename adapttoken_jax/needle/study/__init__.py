"""The needle study: accuracy of every arm and of every open choice of the method, measured on needle videos.

A question's groups are all visited once, by the very functions that `answer` calls. From that log every arm, every
ablation and every stop rule is replayed with the functions of `adapttoken_jax.selection`, and the final prompts of many
questions are answered as one batch. `cells.check_replay` holds the replay against `answer` itself.

videos: scenes and their variants. scans: the log of a scan. replay: from a log to the tokens of the final prompt.
cells: one (task, frames) cell, all arms. measures: intervals and AUC. sections: what the study consists of. plots and
document: what becomes of the numbers.
"""
