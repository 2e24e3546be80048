"""Tasks for lm-eval over local files: the stock tasks' prompts and scores, without a network."""
