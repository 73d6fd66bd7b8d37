"""
Draw an episode of a trained agent as a GIF, with its return and cost so far beside the limit.

    python -m benchmarks.gif --env Safexp-PointButton1-v0 --model runs/Safexp-PointButton1-v0_1/best_model.zip

Prints return and cost of the episode, so that a seed can be chosen whose episode is like the others. Actions are stochastic:
that is the policy whose cost is limited. The picture is made smaller until the file has at most ``--megabytes``.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from stable_baselines3.common.utils import set_random_seed

import sb3_algd.envs  # noqa: F401  registers the tasks
from sb3_algd.common.evaluation import cost_discount
from sb3_algd.compare.__main__ import ALGORITHMS
from sb3_algd.plotting import INK, LIMIT_COLOR

CAPTION_HEIGHT = 28
#: Few colours, and no dithering: frames that are alike are stored once
N_COLORS = 64


def caption(picture: np.ndarray, text: str, alarm: bool) -> Image.Image:
    """
    :param picture: What the environment draws, shape (height, width, 3).
    :param text: What stands above.
    :param alarm: Whether it stands there in the colour of the limit.
    :return: Both together.
    """
    height, width, _ = picture.shape
    image = Image.new("RGB", (width, height + CAPTION_HEIGHT), "white")
    image.paste(Image.fromarray(picture), (0, CAPTION_HEIGHT))
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(image).text((8, 4), text, fill=LIMIT_COLOR if alarm else INK, font=font)
    return image


def play(model: Any, env: gym.Env, seed: int, every: int) -> tuple[list[Image.Image], float, float]:
    """
    Play one episode.

    :param model: The model.
    :param env: Its task, with ``render_mode="rgb_array"`` and one constraint.
    :param seed: Seed of the episode and of the actions.
    :param every: Steps from one frame to the next.
    :return: The frames, the return and the cost.
    """
    set_random_seed(seed)
    gamma, limit = cost_discount(model), float(np.asarray(env.get_wrapper_attr("cost_limit")).item())
    observation, _ = env.reset(seed=seed)
    frames: list[Image.Image] = []
    value = cost = 0.0
    recent: list[float] = []
    done, step = False, 0
    while not done:
        action, _ = model.predict(observation, deterministic=False)
        observation, reward, terminated, truncated, info = env.step(action)
        value, cost = value + float(reward), cost + gamma**step * float(info["cost"])
        step, done = step + 1, terminated or truncated
        recent.append(float(info["cost"]))
        if done or step % every == 0:
            picture = env.render()
            assert isinstance(picture, np.ndarray)
            unit = "cost" if gamma == 1.0 else "discounted cost"
            text = f"step {step}   return {value:.1f}   {unit} {cost:.0f}, limit {limit:g}"
            frames.append(caption(picture, text, alarm=any(recent)))
            recent.clear()
    return frames, value, cost


def encode(frames: list[Image.Image], fps: float) -> bytes:
    """:param frames: The frames. :param fps: How many of them a second. :return: The GIF, which starts again at its end."""
    # One palette for all of them, made from a few
    sample = Image.new("RGB", (frames[0].width, 4 * frames[0].height))
    for i in range(4):
        sample.paste(frames[i * (len(frames) - 1) // 3], (0, i * frames[0].height))
    palette = sample.quantize(N_COLORS)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=1000 / fps, loop=0)
    return file.getvalue()


def shrunk(frames: list[Image.Image], fps: float, max_bytes: int) -> bytes:
    """
    :param frames: The frames.
    :param fps: How many of them a second.
    :param max_bytes: Size of the file, at most.
    :return: The GIF, of smaller frames if need be.
    """
    data = encode(frames, fps)
    while len(data) > max_bytes:
        share = 0.95 * (max_bytes / len(data)) ** 0.5
        width, height = (max(round(share * size), 16) for size in frames[0].size)
        frames = [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
        data = encode(frames, fps)
    return data


def main(arguments: list[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Safexp-PointButton1-v0", help="Gymnasium id of the task")
    parser.add_argument("--model", type=Path, required=True, help="file of the trained model")
    parser.add_argument("--algo", default="algd", choices=list(ALGORITHMS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the episode")
    parser.add_argument(
        "--camera", help="camera of the safety tasks: fixedfar from above (if left out), fixednear, track or vision"
    )
    parser.add_argument("--width", type=int, default=400, help="width and height in pixels, of safety tasks")
    parser.add_argument("--every", type=int, default=4, help="steps from one frame to the next")
    parser.add_argument("--fps", type=float, default=12.5, help="frames a second")
    parser.add_argument("--megabytes", type=float, default=2.0, help="size of the file, at most")
    parser.add_argument("-o", "--out", type=Path, help="the GIF, docs/img/<task>.gif if left out")
    args = parser.parse_args(arguments)
    model = ALGORITHMS[args.algo][0].load(args.model, device="cpu", buffer_size=1)
    options: dict[str, Any] = {}
    if args.env.startswith("Safe"):
        options = {"width": args.width, "height": args.width, "camera_name": args.camera or "fixedfar"}
    env = gym.make(args.env, render_mode="rgb_array", **options)
    frames, value, cost = play(model, env, args.seed, args.every)
    env.close()
    out = args.out or Path("docs/img") / f"{args.env}.gif"
    data = shrunk(frames, args.fps, int(1_000_000 * args.megabytes))
    out.write_bytes(data)
    print(f"{out}: {len(frames)} frames, {len(data) / 1e6:.2f} MB, return {value:.1f}, cost {cost:.1f}")


if __name__ == "__main__":
    main()
