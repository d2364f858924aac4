"""`octavo bench engine`: a whole cluster without HTTP against engines of one process, in one interleaved run.

What is measured, of everybody alike, for B prompts of P tokens each, all submitted at once:

* prefill tok/s = B · P / (time from submitting to the last sequence's first token), with an output of 1 token (where
  nothing is decoded before all prompts are done, as in the peers, the length of the output does not matter, and one
  run shows both phases);
* decode tok/s = tokens / time, from the moment when every sequence has its first token to the moment when the first
  sequence is done: all B sequences decode all the while. For an engine that runs its batch in lockstep, that is every
  token after the first. `decode_to_end_tok_s` lets the same window last to the last token of all: an engine that
  prefills in chunks then decodes with fewer and fewer sequences at the end.

A ratio is the median over repeats of (ours / theirs) within one repeat, whose measurements are minutes apart at most.
"""
