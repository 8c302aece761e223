import logging

import lightning.pytorch  # noqa: F401  its log handlers keep the stream of the moment of import

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).handlers.clear()
