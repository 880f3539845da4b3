"""s5vh_nb/data/plus: Plus as it was trained on the bundled sets of videos, 64 bits, in half precision."""

from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.learning.training import train
from s5vh_nb.models.plus import WEIGHTS

NAMES = ("animated-emoji", "spoken-digits", "spoken-pairs")

if __name__ == "__main__":
    for name in NAMES:
        config = train_config(name, "full", "plus", bits=64, seed=1)
        train(config, load(name), device="cpu").model.half().save_pretrained(WEIGHTS / name)
        (WEIGHTS / name / "README.md").unlink()  # tools/cards.py writes a better one
