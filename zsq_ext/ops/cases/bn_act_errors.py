"""What bn_act and channel_sums refuse, and what they say."""

import torch

from zsq_ext.ops.cases import ErrorCase

_STEP, _ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)

# The good call: u float32 [2, 4, 3], the rest [4], eps 1e-5.
BN_ACT_ERRORS = (
    ErrorCase(
        "u_integer",
        TypeError,
        "bn_act: u must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"u": torch.zeros(2, 4, 3, dtype=torch.int32)},
    ),
    ErrorCase(
        "u_list", TypeError, "bn_act: u must be a float32, float16, bfloat16 or float64 tensor, got list", {"u": [1.0]}
    ),
    ErrorCase("u_1d", ValueError, "bn_act: u must have shape (N, C, ...), got (4,)", {"u": torch.zeros(4)}),
    ErrorCase("mean_none", TypeError, "bn_act: mean must be a tensor, got NoneType", {"mean": None}),
    ErrorCase("var_number", TypeError, "bn_act: var must be a tensor, got float", {"var": 1.0}),
    ErrorCase("gamma_shape", ValueError, "bn_act: gamma must have shape (4,), got (3,)", {"gamma": torch.ones(3)}),
    ErrorCase(
        "mean_shape", ValueError, "bn_act: mean must have shape (4,), got (1, 4, 1)", {"mean": torch.ones(1, 4, 1)}
    ),
    ErrorCase(
        "beta_dtype",
        TypeError,
        "bn_act: beta must be torch.float32 for torch.float32 u, got torch.float16",
        {"beta": torch.zeros(4, dtype=torch.float16)},
    ),
    ErrorCase(
        "mean_dtype_of_fp64",
        TypeError,
        "bn_act: mean must be torch.float64 for torch.float64 u, got torch.float32",
        {"u": torch.zeros(2, 4, 3, dtype=torch.float64), "residual": None},
    ),
    ErrorCase("var_device", ValueError, "bn_act: var must be on cpu, got meta", {"var": torch.ones(4, device="meta")}),
    ErrorCase(
        "var_that_learns",
        ValueError,
        "bn_act: var must be a constant, got one that requires a gradient",
        {"var": torch.ones(4, requires_grad=True)},
    ),
    ErrorCase("eps_negative", ValueError, "bn_act: eps must be >= 0 and finite, got -1.0", {"eps": -1.0}),
    ErrorCase("eps_nan", ValueError, "bn_act: eps must be >= 0 and finite, got nan", {"eps": float("nan")}),
    ErrorCase(
        "act_name", ValueError, "bn_act: act must be one of none, relu, relu6, silu, hardswish, got None", {"act": None}
    ),
    ErrorCase(
        "stats_name", ValueError, "bn_act: stats must be None or one of batch, sample, got 'all'", {"stats": "all"}
    ),
    ErrorCase(
        "extremes_of_nothing",
        ValueError,
        "bn_act: u must not be empty where extremes are wanted, got shape (0, 4, 3)",
        {"u": torch.zeros(0, 4, 3), "residual": None, "extremes": True},
    ),
    ErrorCase("residual_number", TypeError, "bn_act: residual must be a tensor, got float", {"residual": 0.0}),
    ErrorCase(
        "residual_dtype",
        TypeError,
        "bn_act: residual must be torch.float32 as u is, got torch.float64",
        {"residual": torch.zeros(2, 4, 3, dtype=torch.float64)},
    ),
    ErrorCase(
        "residual_shape",
        ValueError,
        "bn_act: residual must have u's shape (2, 4, 3), got (2, 4, 1)",
        {"residual": torch.zeros(2, 4, 1)},
    ),
    ErrorCase(
        "residual_device",
        ValueError,
        "bn_act: residual must be on cpu, got meta",
        {"residual": torch.zeros(2, 4, 3, device="meta")},
    ),
    ErrorCase(
        "quant_list",
        TypeError,
        "bn_act: quant must be None or a tuple (scale, zero_point, qmin, qmax), got list",
        {"quant": [_STEP, _ZERO, 0, 15]},
    ),
    ErrorCase(
        "quant_two",
        TypeError,
        "bn_act: quant must be None or a tuple (scale, zero_point, qmin, qmax), got 2 values",
        {"quant": (_STEP, _ZERO)},
    ),
    ErrorCase(
        "quant_scale_shape",
        ValueError,
        "bn_act: quant's scale must have shape (1,) or (4,), got (3,)",
        {"quant": (torch.ones(3), _ZERO, 0, 15)},
    ),
    ErrorCase(
        "quant_zero_point_dtype",
        TypeError,
        "bn_act: quant's zero_point must be torch.int32 for torch.float32 u, got torch.int64",
        {"quant": (_STEP, _ZERO.long(), 0, 15)},
    ),
    ErrorCase(
        "quant_range",
        ValueError,
        "bn_act: quant's qmin must be <= quant's qmax, both within 2**24 of 0, got 3 and 2",
        {"quant": (_STEP, _ZERO, 3, 2)},
    ),
    ErrorCase(
        "quant_grad_lsq",
        ValueError,
        "bn_act: quant_grad must be one of ste_clip, ste, got 'lsq'; a step that learns (lsq) needs fake_quant behind "
        "bn_act",
        {"quant": (_STEP, _ZERO, 0, 15), "quant_grad": "lsq"},
    ),
)

# The good call: u float32 [2, 4, 3], mean [4].
CHANNEL_SUMS_ERRORS = (
    ErrorCase("u_1d", ValueError, "channel_sums: u must have shape (N, C, ...), got (4,)", {"u": torch.zeros(4)}),
    ErrorCase("mean_none", TypeError, "channel_sums: mean must be a tensor, got NoneType", {"mean": None}),
    ErrorCase("mean_shape", ValueError, "channel_sums: mean must have shape (4,), got (2,)", {"mean": torch.ones(2)}),
    ErrorCase("stats_name", ValueError, "channel_sums: stats must be one of batch, sample, got None", {"stats": None}),
)
