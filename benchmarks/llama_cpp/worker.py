"""llama.cpp in a process of its own, run by an interpreter with llama-cpp-python and numpy: `python worker.py FILE THREADS`.

Reads lines, answers each with one. `start BATCH CONTEXT`: so many sequences of random tokens, their prompts computed.
`step`: seconds of one greedy step of all of them. `text PROMPT`: some words that the model says, as a check of the file.
"""

import ctypes
import sys
import time

import llama_cpp
import numpy as np

MOST_TOKENS = 32 * 192


class Model:
    """A GGUF file, loaded."""

    def __init__(self, file: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = MOST_TOKENS, 512, 512, 32
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.last: list[int] = []
        self.position = 0

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run rows (token, position, sequence, whether logits are wanted); the likeliest tokens after the wanted ones."""
        self.batch.n_tokens = len(rows)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[place] = token
            self.batch.pos[place] = position
            self.batch.n_seq_id[place] = 1
            self.batch.seq_id[place][0] = sequence
            self.batch.logits[place] = wanted
        assert llama_cpp.llama_decode(self.context, self.batch) == 0
        return [self._likeliest(place) for place, row in enumerate(rows) if row[3]]

    def _likeliest(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def start(self, batch: int, context: int) -> None:
        """Forget everything; compute `batch` prompts."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        draw = np.random.default_rng(0)
        self.last = []
        for sequence in range(batch):
            prompt = draw.integers(1000, 100_000, context).tolist()
            self.last += self.decode([(token, at, sequence, at == context - 1) for at, token in enumerate(prompt)])
        self.position = context

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.last = self.decode([(token, self.position, number, True) for number, token in enumerate(self.last)])
        self.position += 1
        return time.perf_counter() - began

    def text(self, prompt: str) -> str:
        """The prompt and what follows."""
        ids = (llama_cpp.llama_token * 64)()
        count = llama_cpp.llama_tokenize(self.vocab, prompt.encode(), len(prompt.encode()), ids, 64, False, False)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        said = ids[:count]
        token = self.decode([(token, at, 0, at == count - 1) for at, token in enumerate(said)])[0]
        for at in range(count, count + 24):
            said.append(token)
            token = self.decode([(token, at, 0, True)])[0]
        piece = ctypes.create_string_buffer(64)
        sizes = (llama_cpp.llama_token_to_piece(self.vocab, one, piece, 64, 0, False) for one in said)
        return b"".join(piece.raw[:size] for size in sizes).decode(errors="replace")


def main() -> None:
    """Serve."""
    model = Model(sys.argv[1], int(sys.argv[2]))
    print("ready", llama_cpp.__version__, flush=True)
    for line in sys.stdin:
        command, _, rest = line.rstrip("\n").partition(" ")
        if command == "start":
            batch, context = map(int, rest.split())
            model.start(batch, context)
            print("started", flush=True)
        elif command == "step":
            print(model.step(), flush=True)
        else:
            print(repr(model.text(rest)), flush=True)


if __name__ == "__main__":
    main()
