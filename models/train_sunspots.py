"""Trains models/zoo/sunspots-lstm: next year's sunspot number from this year's and what the state remembers.

    pip install -e models 'torch==2.13.0' statsmodels
    python models/train_sunspots.py            # trains, writes weights.safetensors, prints the table of errors
    python models/train_sunspots.py --score    # prints the table for the weights that are there; needs no torch

Training is seeded and single-threaded: on one kind of machine and one version of torch it gives the same weights.
Each candidate seed trains on the years to 1920 and stops where the years 1921 to 1950 are forecast best; the seed that
forecasts those best is kept. The years from 1951 to 2008 decide nothing: they are only scored, once, at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import statsmodels.datasets
from safetensors.numpy import save

from rnnserve_models.load import load_model

MODEL = Path(__file__).parent / "zoo" / "sunspots-lstm" / "1"
UNITS = 32
SEEDS = range(10)
EPOCHS = 300
LEARNING_RATE = 5e-3
WARM_UP = 11
"""Years, one solar cycle, from whose forecasts nothing is learnt: the state has not seen a cycle yet."""

TRAIN_TO, VALIDATE_TO = 1920, 1950


def sunspots() -> tuple[np.ndarray, np.ndarray]:
    """The years [309] int64, 1700 to 2008, and their mean sunspot numbers [309] float64."""
    data = statsmodels.datasets.sunspots.load_pandas().data
    return data["YEAR"].to_numpy(np.int64), data["SUNACTIVITY"].to_numpy(np.float64)


def forecast(numbers: np.ndarray) -> np.ndarray:
    """For each number [T] in turn, the forecast [T] of the one that follows it, by the model as it is served."""
    engine = load_model(MODEL, engine="numpy").engine
    x = numbers.astype(np.float32).reshape(-1, 1, 1)  # [T, 1 row, 1 feature]
    outputs, _ = engine.run({"input": x}, np.array([len(x)]), {state.name: state.initial(1) for state in engine.states})
    return outputs["output"].ravel().astype(np.float64)


def autoregression(years: np.ndarray, numbers: np.ndarray, order: int) -> np.ndarray:
    """Forecasts [T] by least squares on the ``order`` years before, fitted up to VALIDATE_TO; NaN at first."""
    lags = np.full((len(numbers), order + 1), np.nan)
    lags[:, 0] = 1
    for lag in range(1, order + 1):
        lags[lag:, lag] = numbers[:-lag]
    known = (np.arange(len(numbers)) >= order) & (years <= VALIDATE_TO)
    return lags @ np.linalg.lstsq(lags[known], numbers[known])[0]


def errors() -> dict[str, tuple[float, float]]:
    """The root mean square error and the mean absolute error of each forecast of the held-out years."""
    years, numbers = sunspots()
    nothing = np.nan
    forecasts = {
        "sunspots-lstm": np.concatenate([[nothing], forecast(numbers)[:-1]]),
        "last year's number": np.concatenate([[nothing], numbers[:-1]]),
        "the number 11 years before": np.concatenate([[nothing] * 11, numbers[:-11]]),
        "linear autoregression, 2 years": autoregression(years, numbers, 2),
        "linear autoregression, 9 years": autoregression(years, numbers, 9),
    }
    held_out = years > VALIDATE_TO
    table = {}
    for name, predicted in forecasts.items():
        error = (predicted - numbers)[held_out]
        table[name] = (float(np.sqrt(np.mean(error**2))), float(np.mean(np.abs(error))))
    return table


def train() -> dict[str, np.ndarray]:
    """The weights, float32, in the layout of the zoo."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    years, numbers = sunspots()
    target_years = years[1:]
    learnt = (target_years <= TRAIN_TO) & (np.arange(len(target_years)) >= WARM_UP)
    validated = (target_years > TRAIN_TO) & (target_years <= VALIDATE_TO)
    mean, scale = numbers[years <= TRAIN_TO].mean(), numbers[years <= TRAIN_TO].std()
    series = torch.tensor((numbers - mean) / scale, dtype=torch.float32)[:, None]  # [T, 1]: torch's unbatched form
    learnt_rows, validated_rows = torch.from_numpy(learnt), torch.from_numpy(validated)

    best_loss, best = np.inf, {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        lstm, dense = torch.nn.LSTM(1, UNITS), torch.nn.Linear(UNITS, 1)
        parameters = [*lstm.parameters(), *dense.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        seed_loss = np.inf
        for _ in range(EPOCHS):
            error = (dense(lstm(series[:-1])[0]) - series[1:])[:, 0]
            loss = error[validated_rows].square().mean().item()
            seed_loss = min(seed_loss, loss)
            if loss < best_loss:
                best_loss = loss
                best = {
                    **{f"lstm.{name}": value.detach().numpy().copy() for name, value in lstm.named_parameters()},
                    **{f"dense.{name}": value.detach().numpy().copy() for name, value in dense.named_parameters()},
                }
            optimiser.zero_grad()
            error[learnt_rows].square().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        print(f"seed {seed}: validation RMSE {scale * np.sqrt(seed_loss):.2f}")
    return folded(best, mean, scale)


def folded(torch_weights: Mapping[str, np.ndarray], mean: float, scale: float) -> dict[str, np.ndarray]:
    """From torch's layout to Keras's, whose gates come in the same order, with the normalisation in the weights.

    (x - mean) / scale times W is x times W / scale, less mean / scale times W; and what Dense gives is scaled back.
    """
    wide = {name: value.astype(np.float64) for name, value in torch_weights.items()}
    kernel = wide["lstm.weight_ih_l0"].T / scale  # [1, 4 * units]
    weights = {
        "0.kernel": kernel,
        "0.recurrent_kernel": wide["lstm.weight_hh_l0"].T,
        "0.bias": wide["lstm.bias_ih_l0"] + wide["lstm.bias_hh_l0"] - mean * kernel[0],
        "1.kernel": wide["dense.weight"].T * scale,
        "1.bias": wide["dense.bias"] * scale + mean,
    }
    return {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}


def main() -> None:
    """Trains, unless told to score only; prints the table of errors as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", action="store_true", help="score the weights that are there")
    if not parser.parse_args().score:
        (MODEL / "weights.safetensors").write_bytes(save(train()))
    print("\n| Forecast, 1951 to 2008 | RMSE | MAE |\n|---|---:|---:|")
    for name, (rmse, mae) in errors().items():
        print(f"| {name} | {rmse:.2f} | {mae:.2f} |")


if __name__ == "__main__":
    main()
