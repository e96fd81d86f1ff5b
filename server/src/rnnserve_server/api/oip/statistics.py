"""What a model has done, in the words of the Open Inference Protocol."""

from __future__ import annotations

from rnnserve_models.load import LoadedModel
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.meter import ModelTally, Took


def statistics(model: LoadedModel, tally: ModelTally) -> pb.ModelStatistics:
    """A version's tally."""
    return pb.ModelStatistics(
        name=model.name,
        version=model.version,
        last_inference=round(tally.last * 1000),
        inference_count=tally.rows,
        execution_count=sum(took.count for took in tally.runs.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(tally.success),
            fail=_duration(tally.fail),
            queue=_duration(tally.queue),
            compute_input=_duration(tally.compute_input),
            compute_infer=_duration(tally.compute_infer),
            compute_output=_duration(tally.compute_output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=rows, compute_infer=_duration(took))
            for rows, took in sorted(tally.runs.items())
        ],
    )


def _duration(took: Took) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=took.count, ns=round(took.seconds * 1e9))
