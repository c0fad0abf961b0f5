"""The small model's tokenizer: the structure of the V4 tokenizer.json (spec: tokenizer.md), merges learnt from the corpus."""
import functools, os, random
import tiny_corpus as corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPLITS = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
          "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
          " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"]
SPECIAL = [corpus.BOS, corpus.EOS, "<｜▁pad▁｜>"]
ADDED = """<｜fim▁hole｜> <｜fim▁begin｜> <｜fim▁end｜> <｜User｜> <｜Assistant｜> <|EOT|> <｜tool▁calls▁begin｜>
<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜>
<｜tool▁output▁begin｜> <｜tool▁output▁end｜> <｜tool▁sep｜> <｜begin▁of▁repo▁name｜> <｜end▁of▁repo▁name｜>
<｜begin▁of▁file▁name｜> <｜end▁of▁file▁name｜> <｜begin▁of▁file｜> <｜end▁of▁file｜> <think> </think> ｜DSML｜
<｜begin▁sys｜> <｜end▁sys｜> <｜latest_reminder｜> <｜action｜> <｜query｜> <｜authority｜> <｜domain｜> <｜task｜> <｜political｜>
<｜entity｜> <｜title｜> <｜safety｜> <｜answer｜> <｜search｜> <dsml: </dsml: <｜search▁begin｜> <｜search▁end｜>
<｜extracted_url｜> <｜read_url｜>""".split()
LAST = "<｜end_of_query｜>"

FILE = os.path.join(os.path.dirname(__file__), "../models/tiny/tokenizer.json")


def texts():
    """What the merges are learnt from: documents without control tokens, and every word that can be a fact."""
    r = random.Random(1)
    for _ in range(6000):
        s = corpus.text_of(corpus.document(r, 400, [1, 3, 3, 1, 3, 4]))
        for x in SPECIAL + ADDED:
            s = s.replace(x, "\n")
        yield from s.split("\n")
    for w in (corpus.NAMES + corpus.OBJECTS + corpus.COLOURS + corpus.PLACES + corpus.FOODS + corpus.JOBS + corpus.ANIMALS):
        yield (" " + w) * 1000


@functools.cache
def build(size):
    """The tokenizers.Tokenizer with `size` ids: 3 special, 256 bytes, merges, 45 added tokens. Once learnt, it stays."""
    if os.path.exists(FILE):
        return Tokenizer.from_file(FILE)
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([])
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(x), "isolated") for x in SPLITS] +
        [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=size - len(ADDED) - 1, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    t.add_tokens([AddedToken(x, normalized=True, special=False) for x in ADDED])
    t.add_special_tokens([AddedToken(LAST, normalized=False, special=True)])
    os.makedirs(os.path.dirname(FILE), exist_ok=True)
    t.save(FILE)
    return t
