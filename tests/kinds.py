"""Tokenizers of every pipeline: what they strip, merge and split differs, and what each loses when it decodes."""

import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "the cat sat on the mat, and the dog's bed isn't there. Don't you know? 'Yes', they've said!",
    "el niño comió piñata; où est l'été déjà vu, Größe über alles.",
    "def main():\n    return 42  # two  spaces\n\tand a tab.",
    "我喜歡吃蘋果。今日は良い天気です。 한국어 문장입니다.",
    "thumbs 👍🏽 up, family 👩‍👩‍👧 and flag 🇸🇪!",
]
_PIECES = [
    *"aeiou",
    "cat",
    " the",
    "n't",
    " 's",
    " '",
    ".",
    " .",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "ñ",
    "Ö",
    "e\u0301",
    "我",
    "天気",
]
_PIECES += [
    "한국",
    "👍🏽",
    "👩‍👩‍👧",
    "🇸🇪",
    "😀",
    "€",
    "\u00a0",
    "ﬁ",
    "Ω",
    "<0x41>",
    "42",
    "def main():\n    ",
    "\ufffd",
]


def texts(count, seed=0):
    """Random texts with accents, CJK, emoji, white space and odd spellings."""
    draw = random.Random(seed)
    for _ in range(count):
        pieces = [draw.choice([*_PIECES, *draw.choice(CORPUS).split(" ")]) for _ in range(draw.randint(1, 12))]
        yield draw.choice(["", " "]).join(pieces)


def _bpe(**how):
    return Tokenizer(models.BPE(unk_token="<unk>", **how))


def _wrapped(tokenizer, trainer=None, corpus=(), **how):
    if trainer:
        tokenizer.train_from_iterator(corpus, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    how = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **how}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **how)


def byte_level(corpus=CORPUS):
    """GPT-2's kind: characters are split into bytes."""
    tokenizer = _bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _wrapped(
        tokenizer, trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet), corpus
    )


def sentencepiece(corpus=CORPUS):
    """Llama 2's kind: the first space is stripped, and a run of byte tokens is decoded as a whole."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    plain = [text for text in corpus if text.isascii()]
    _wrapped(tokenizer, trainers.BpeTrainer(vocab_size=140, special_tokens=SPECIAL), plain)
    state = json.loads(tokenizer.to_str())
    for byte in range(256):
        state["model"]["vocab"][f"<0x{byte:02X}>"] = len(state["model"]["vocab"])
    state["model"]["byte_fallback"] = True
    return _wrapped(Tokenizer.from_str(json.dumps(state)))


def unigram(corpus=CORPUS):
    """T5's kind: white space and width are normalised away, and unknown characters are lost."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    return _wrapped(tokenizer, trainer, corpus)


def cleaning(corpus=CORPUS):
    """A unigram tokenizer whose decoded text is cleaned up: spaces before punctuation vanish."""
    tokenizer = unigram(corpus)
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


def word_pieces(corpus=CORPUS):
    """BERT's kind: lower case, `##` inside a word, and a space before any other piece."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL)
    return _wrapped(tokenizer, trainer, corpus, clean_up_tokenization_spaces=True)


def word_ends(corpus=CORPUS):
    """GPT-1's kind: a suffix ends a word, which becomes a space unless it is the last."""
    tokenizer = _bpe(end_of_word_suffix="</w>")
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    return _wrapped(tokenizer, trainer, corpus)


KINDS = {make.__name__: make for make in (byte_level, sentencepiece, unigram, cleaning, word_pieces, word_ends)}
