"""The peer of benchmarks/data_report.py: render and tokenise chat rows by `datasets` map.

Run as `python datasets_map.py ORDER`, ORDER a JSON object: rows (JSONL), base (folder), cache (empty folder),
batched, num_proc. Prints one JSON line: rows, tokens, seconds from the file to the last token.
"""

import json
import sys
import time

import datasets
import transformers


def main() -> None:
    order = json.loads(sys.argv[1])
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(order["base"], local_files_only=True)

    def tokenize(rows):
        return {
            "input_ids": tokenizer.apply_chat_template(rows["messages"], tokenize=True, return_dict=False)
        }

    begin = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=order["rows"], split="train", cache_dir=order["cache"])
    num_proc = order["num_proc"] if order["num_proc"] > 1 else None
    done = rows.map(tokenize, batched=order["batched"], num_proc=num_proc, remove_columns=rows.column_names)
    seconds = time.perf_counter() - begin
    num_tokens = sum(len(row) for batch in done.iter(1000) for row in batch["input_ids"])
    print(json.dumps({"rows": len(done), "tokens": num_tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
