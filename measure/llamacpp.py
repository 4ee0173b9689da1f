"""`bench.py rollout --vs llamacpp`: llama.cpp's side, in its own environment (measure/worker.py).

    python -m venv FOLDER
    CMAKE_ARGS=-DGGML_NATIVE=ON FOLDER/bin/pip install --no-binary llama-cpp-python \\
        llama-cpp-python gguf safetensors               (built for this processor)
    python bench.py rollout --vs llamacpp --llamacpp-python FOLDER/bin/python

A prompt goes through the model once and its keys and values are copied to its group
(llama_memory_seq_cp). Then each llama_decode takes one token of every row that is running, and
llama.cpp's own sampler chain (temperature 1, then dist) draws the next ones, without log-probs.

What is best for llama.cpp was chosen. Every sequence has a part of the cache of its own, because in
one cache for all (--llamacpp-cache unified) each row walks past the keys of all others. Sequences
are numbered by their lengths, which are known here: the running ones then stay neighbours, and
llama.cpp computes only neighbours together. Weights, keys and values are float32 or float16
(--gguf-dtype). Its flash attention rounds to half precision also with float32: SmolLM2-135M's
log-probs are then 0.004 off, and without it (--no-flash) 0.00001. The file is written from the very
weights of our side, with no vocabulary: only ids go in and come out. --gguf FILE takes another
file, such as a quantized one.
"""
import ctypes
import os
import time
from pathlib import Path

from measure.worker import serve

MOST_ROWS = 256         # LLAMA_MAX_SEQ
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


def missing(error):
    """Returns the ValueError for a library that this Python does not have."""
    return ValueError(f"this Python has no {error.name}: pip install llama-cpp-python gguf "
                      "safetensors there, or name another by --llamacpp-python")


# ------------------------------------------------------------------------------------ the GGUF file

def convert(folder, config, half, file):
    """Write the checkpoint in a folder as a GGUF file, in float16 if half, else in float32.

    config: the fields of its ModelConfig. Raises ValueError for a model that is not known here."""
    try:
        import gguf
        from safetensors.numpy import load_file
    except ImportError as error:
        raise missing(error) from None

    kind = config["model_type"]
    if kind not in ARCHITECTURES or config["rope_scaling"]:
        raise ValueError(f"no conversion of a {kind} model with rope_scaling "
                         f"{config['rope_scaling']}: give --gguf FILE")

    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer, config, half)

    for part in sorted(Path(folder).glob("model*.safetensors")):
        for name, values in load_file(part).items():
            if config["tie_word_embeddings"] and name == "lm_head.weight":
                continue
            if kind == "llama" and "q_proj" in name:
                values = halves_to_pairs(values, config["num_attention_heads"])
            if kind == "llama" and "k_proj" in name:
                values = halves_to_pairs(values, config["num_key_value_heads"])
            dtype = "float16" if half and values.ndim == 2 else "float32"
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), values.astype(dtype))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer, config, half):
    """Write what llama.cpp has to know of the model besides its weights."""
    writer.add_file_type(1 if half else 0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])

    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])


def halves_to_pairs(values, heads):
    """Returns a projection to queries or keys in llama.cpp's order of a "llama" model.

    Rotated together are i and i + D/2 in the checkpoint, and 2i and 2i + 1 in llama.cpp."""
    parts = values.reshape(heads, 2, -1, *values.shape[1:])
    return parts.swapaxes(1, 2).reshape(values.shape)


# ------------------------------------------------------------------------------------------ drawing

class Drawing:
    """A llama.cpp context with room for all rows of the request, and how it draws them.

    Sequences are numbered by their lengths, the longest first."""

    def __init__(self, llama, request, file):
        self.llama = llama
        self.prompts = request["prompts"]
        group_size, lengths = request["group_size"], request["lengths"]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        self.lengths = [lengths[row] for row in order]
        self.prompt_of = [row // group_size for row in order]

        # the sequence that takes each prompt in, and those that get a copy of it
        self.first = [self.prompt_of.index(prompt) for prompt in range(len(self.prompts))]

        self.model = llama.llama_model_load_from_file(
            file.encode(), llama.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {file}")
        self.size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.context = llama.llama_init_from_model(self.model, self.settings(request))
        if not self.context:
            raise ValueError("llama.cpp could not make a context")
        self.memory = llama.llama_get_memory(self.context)

        tokens = max(sum(map(len, self.prompts)), len(lengths))
        self.batch = llama.llama_batch_init(tokens, 0, 1)
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(1.0))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(0))
        self.chain = chain

    def settings(self, request):
        """Returns the parameters of the context."""
        rows = len(self.lengths)
        own = max(max(self.lengths), request["check_tokens"])
        longest = max(map(len, self.prompts)) + own
        unified = request["cache"] == "unified"

        given = self.llama.llama_context_default_params()
        given.n_seq_max = rows
        given.kv_unified = unified
        # in a cache for all a prompt is there once, else a part is as long as the longest text
        shared = sum(map(len, self.prompts)) + sum(self.lengths) + own
        given.n_ctx = shared if unified else rows * (-longest // 256 * -256)
        given.n_batch = max(sum(map(len, self.prompts)), rows)
        given.n_ubatch = max(512, rows)
        given.n_threads = given.n_threads_batch = request["threads"]
        given.type_k = given.type_v = 1 if request["half"] else 0       # GGML_TYPE_F16 or F32
        # by default llama.cpp decides, which on the CPU is for it
        if not request["flash"]:
            given.flash_attn_type = self.llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        given.no_perf = True
        return given

    def decode(self, tokens):
        """Run the model on [(token, position, sequence, whether logits are wanted)]."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted

        code = self.llama.llama_decode(self.context, batch)
        if code:
            raise ValueError(f"llama_decode gave {code}")

    def read_prompts(self):
        """Run all prompts. Returns where in the batch the last token of each stands."""
        tokens, ends = [], []
        for prompt, sequence in zip(self.prompts, self.first):
            last = len(prompt) - 1
            tokens += [(token, i, sequence, i == last) for i, token in enumerate(prompt)]
            ends.append(len(tokens) - 1)
        self.decode(tokens)
        return ends

    def draw(self, position_in_batch):
        """Returns a token of the logits at a position of the last batch."""
        return self.llama.llama_sampler_sample(self.chain, self.context, position_in_batch)

    def round(self):
        """Draw all completions. Returns the number of tokens that were drawn."""
        llama = self.llama
        llama.llama_memory_clear(self.memory, False)
        ends = self.read_prompts()
        newest = [self.draw(ends[prompt]) for prompt in self.prompt_of]
        for sequence, prompt in enumerate(self.prompt_of):
            if sequence != self.first[prompt]:
                llama.llama_memory_seq_cp(self.memory, self.first[prompt], sequence, -1, -1)

        drawn = len(newest)
        starts = [len(self.prompts[prompt]) for prompt in self.prompt_of]
        running = len(newest)
        for position in range(1, self.lengths[0]):
            while self.lengths[running - 1] <= position:
                running -= 1
            self.decode([(newest[row], starts[row] + position - 1, row, True)
                         for row in range(running)])
            newest = [self.draw(row) for row in range(running)]
            drawn += running
        return drawn

    def greedy(self, count):
        """Returns (tokens, log-probs) of the first prompt's likeliest continuation."""
        import numpy as np
        llama, prompt = self.llama, self.prompts[0]
        llama.llama_memory_clear(self.memory, False)
        last = len(prompt) - 1
        self.decode([(token, i, 0, i == last) for i, token in enumerate(prompt)])

        tokens, logps, place = [], [], last
        for position in range(len(prompt), len(prompt) + count):
            found = llama.llama_get_logits_ith(self.context, place)
            address = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
            logits = np.ctypeslib.as_array(address, (self.size,)).astype(np.float64)
            token = int(logits.argmax())
            tokens.append(token)
            logps.append(float(-np.log(np.exp(logits - logits[token]).sum())))
            self.decode([(token, position, 0, True)])
            place = 0
        return tokens, logps


def load(request):
    """Returns the first answer, and the function that makes a round; see measure/worker.py."""
    try:
        import llama_cpp
        from llama_cpp import llama_cpp as llama
    except ImportError as error:
        raise missing(error) from None
    if len(request["lengths"]) > MOST_ROWS:
        raise ValueError(f"llama.cpp runs {MOST_ROWS} rows at most, not {len(request['lengths'])}")

    file = request["gguf"]
    if not file:
        file = os.path.abspath("model.gguf")            # in the worker's own, temporary folder
        convert(request["model"], request["config"], request["half"], file)
    llama.llama_backend_init()
    drawing = Drawing(llama, request, file)

    def one_round(warm):
        begin = time.perf_counter()
        drawn = drawing.round()
        seconds = time.perf_counter() - begin
        if drawn != sum(request["lengths"]):
            raise ValueError("llama.cpp did not draw the lengths it was given")
        return {"seconds": seconds}

    tokens, logps = drawing.greedy(request["check_tokens"])
    first = {
        "version": llama_cpp.__version__,
        "system": llama.llama_print_system_info().decode(),
        "cache": request["cache"],
        "flash_attention": request["flash"],
        "gguf_bytes": os.path.getsize(file),
        "check": {"tokens": tokens, "logps": logps},
    }
    return first, one_round


def main():
    serve(load)
