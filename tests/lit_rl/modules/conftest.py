import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for surgery_worker, which is a program as well
