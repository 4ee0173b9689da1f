"""The machinery under the concepts. It imports nothing of the root but dist.py.

    decode, batching, sampling      how rollout.py draws: the model, who is drawn when, a token
    kernels, logps                  formulas of the transformer; log-probs without (B, T, V)
    weights, checkpoint             a model's files; a run's folder and its checkpoints
    machine                         memory, threads, and the frame of a program

The engine's own words, each with one meaning:

    completion      one of the N x G texts that a call draws, by its number
    waiting, running    completions that are not in the cache yet; those that have a slot
    row, slot       a completion's line in a step's batch and in the cache; it passes to the next
                    completion when its own has ended
    seat            the place of a prompt in the cache; all rows of its group read it there
    step            one token for every row (a training step is train.py's)
    look            the host reads which rows have stopped, which waits for the device
    own             of keys and values: those of a row's drawn tokens, not its prompt's
    block           several of a row's own slots that lie together (CPU); or a block of the model
    by_prompt, by_row   indices that bring rows to the order of their prompts, and back
    lent            of a weight: whole only while FSDP has its module gathered, so it is copied
    blocked         of a weight: stored in the order in which oneDNN computes
    bucket          sequences of like size that are padded together; sizes rounded up to a few
    host            the CPU that drives an accelerator; to look at a result there is to wait
    part            a piece of the vocabulary (sampling) or of the keys (attention)
"""
