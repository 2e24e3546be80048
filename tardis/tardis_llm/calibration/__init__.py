"""From text to statistics of every FFN: text to tokens, tokens to hidden states, block by block in bounded memory."""
