"""Exact search against one large product with topk, and against FAISS's flat index: ``python -m benchmarks.search``.

Random unit vectors of width 384, the best 100 for 200 queries. Peak memory is what a search adds; building the FAISS
index (a copy of the vectors) is counted in its time and memory, as ours needs none.
"""

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness import alternate, announce, arguments, peak_memory, print_table, reset_peak_memory

WIDTH, QUERIES, TOP_K = 384, 200, 100
AGREEMENT = 0.999  # share of equal ids; near-equal scores may change places between kernels


def compare(count: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table for one corpus size."""
    import faiss
    import torch
    import torch.nn.functional as F

    from lit_embed.retrieval.index import search

    generator = torch.Generator().manual_seed(0)
    corpus = F.normalize(torch.randn(count, WIDTH, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(QUERIES, WIDTH, generator=generator), dim=-1)

    def ours() -> tuple[Any, Any]:
        return search(queries, corpus, TOP_K, backend="exact")

    def naive() -> tuple[Any, Any]:
        values, columns = (queries @ corpus.T).topk(TOP_K)
        return values, columns

    def flat() -> tuple[Any, Any]:
        index = faiss.IndexFlatIP(WIDTH)
        index.add(corpus.numpy())
        values, columns = index.search(queries.numpy(), TOP_K)
        return torch.from_numpy(values), torch.from_numpy(columns)

    faiss.omp_set_num_threads(torch.get_num_threads())
    variants: dict[str, Callable[[], tuple[Any, Any]]] = {"ours": ours, "matmul + topk": naive, "faiss flat": flat}
    memory = {}
    results = {}
    for name, call in variants.items():
        before = reset_peak_memory()
        results[name] = call()
        memory[name] = peak_memory() - before
    times = alternate(variants, repetitions)
    rows = []
    for name, (values, columns) in results.items():
        same = float((columns == results["ours"][1]).float().mean())
        difference = float((values - results["ours"][0]).abs().max())
        rows.append(
            {
                "vectors": count,
                "variant": name,
                "cpu s": times[name].cpu_median,
                "wall s": times[name].wall_median,
                "cpu / ours": times[name].cpu_median / times["ours"].cpu_median,
                "added MiB": memory[name],
                "same ids": same,
                "scores differ": difference,
                "equal": same >= AGREEMENT and difference < 1e-5,
            }
        )
    return rows


def main() -> int:
    """Compare; 1 where results differ."""
    settings = arguments(__doc__)
    announce(
        "Exact search",
        ("torch", "faiss-cpu"),
        settings.threads,
        f"{QUERIES} queries, best {TOP_K}, width {WIDTH}; medians of alternating repetitions",
    )
    rows = compare(*((20_000, 3) if settings.quick else (100_000, 7)))
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
