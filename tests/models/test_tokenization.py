"""Token ids against transformers' own tokenizer, on the folders of published models in small."""

import json
from concurrent import futures

import numpy as np
import pytest
import transformers

from jaxalign.models import tokenization

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "i n", "in g</w>", "Ã ©</w>", "' s</w>", "2 0"]
PROMPTS = {
  "words": "the cat painting the cat",
  "empty": "",
  "blanks": " \t\n ",
  "capitals and blanks": "  The   CAT\npaintING ",
  "composed accents": "café ÉCLAIR naïve Ångström",
  "decomposed accents": "cafe\u0301 E\u0301CLAIR nai\u0308ve A\u030angstro\u0308m",
  "emoji": "a 🐱 cat 👩‍🚀🏽",
  "curly quotes": "the cat\u2019s \u201cpainting\u201d \u2014 it\u2019s \u2026",
  "straight quotes": "the cat's 'painting' we'll don't",
  "brackets": "((a cat:1.3)), [the | cat] {x}\\(y\\) <lora:a:1>",
  "html": "cats &amp; dogs &lt;b&gt;",
  "special tokens in the text": f"a cat{END} the {START}cat",
  "exclamation marks": "cat! cat!! !the",
  "digits": "2023, 16:9, 3.14 and 4k",
  "scripts": "猫の絵 кошка قط Ελλάδα",
  "control characters": "a\x00cat\u200bthe\ufeffcat\x7f",
  "as long as fits": "cat " * 75,
  "one too long": "cat " * 76,
  "very long": "the painting of a cat, " * 40,
}


def tokenize(folder, prompts):
  return tokenization.tokenize(folder, prompts, LENGTH, num_embeddings=1000)


def byte_characters():
  """The 256 characters that stand for the bytes in CLIP's vocabulary, printable ones first."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_published(folder, pad):
  """The files that published folders have; "!" is the first entry, the end of text the last."""
  folder.mkdir()
  bytes_ = byte_characters()
  vocab = [*bytes_, *(character + "</w>" for character in bytes_)]
  vocab += [merge.replace(" ", "") for merge in MERGES] + [START, END]
  ids = {token: i for i, token in enumerate(vocab)}

  def special(token):
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": token, **flags}

  tokens = {"bos_token": special(START), "eos_token": special(END), "unk_token": special(END)}
  config = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": LENGTH,
    "tokenizer_class": "CLIPTokenizer",
    **{name: {"__type": "AddedToken", **token} for name, token in tokens.items()},
    "pad_token": pad,
  }
  (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
  (folder / "special_tokens_map.json").write_text(json.dumps({**tokens, "pad_token": pad}))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


@pytest.fixture(scope="module", params=[END, "!"], ids=["first of XL", "second of XL"])
def folder(request, tmp_path_factory):
  return write_published(tmp_path_factory.mktemp("published") / "tokenizer", request.param)


@pytest.fixture(scope="module")
def oracle(folder):
  return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:a prompt has")
@pytest.mark.parametrize("name", PROMPTS)
def test_equals_transformers(name, folder, oracle):
  prompt = PROMPTS[name]
  expected = oracle(prompt, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
  found = tokenize(folder, [prompt, "cat"])
  assert found.shape == (2, LENGTH) and found.dtype == np.int32
  np.testing.assert_array_equal(found[0], expected)
  assert found[0, 0] == oracle.bos_token_id
  assert oracle.eos_token_id in found[0]


def test_threads_get_what_one_thread_gets(folder):
  """A call switches the tokenizer's padding, which another thread must not meet half done."""
  batches = [["the " * n, "cat"] for n in range(1, 9)]
  expected = [tokenize(folder, batch) for batch in batches]
  with futures.ThreadPoolExecutor(8) as threads:
    for _ in range(100):
      found = threads.map(lambda batch: tokenize(folder, batch), batches)
      np.testing.assert_array_equal(list(found), expected)


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_what_the_ids_mean(folder, oracle):
  vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
  start, end, pad = vocab[START], vocab[END], oracle.pad_token_id
  assert (start, end) == (len(vocab) - 2, len(vocab) - 1)
  assert pad == vocab[oracle.pad_token] and pad in (0, end)
  rows = dict(zip(PROMPTS, tokenize(folder, list(PROMPTS.values())), strict=True))
  # A prompt of nothing is start, end, padding.
  for name in ("empty", "blanks"):
    np.testing.assert_array_equal(rows[name], [start, end] + [pad] * (LENGTH - 2))
  # Case, blanks and the way an accent is written make no difference.
  np.testing.assert_array_equal(rows["composed accents"], rows["decomposed accents"])
  assert list(rows["capitals and blanks"][1:3]) == [vocab["the</w>"], vocab["cat</w>"]]
  # Curly quotes stay what they are: three bytes, of which U+2019 begins with E2.
  assert list(rows["curly quotes"][1:4]) == [vocab["the</w>"], vocab["cat</w>"], vocab["â"]]
  # 75 words fit; of more the first 75 are kept, and the end is there in any case.
  for name in ("as long as fits", "one too long"):
    np.testing.assert_array_equal(rows[name], [start, *[vocab["cat</w>"]] * 75, end])
  assert rows["very long"][-1] == end
