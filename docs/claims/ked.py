"""Claims of KED (arXiv 2310.02572)."""

from __future__ import annotations

from docs.claims.sections import Claim, Difference

_DIGITS, _CIFAR10 = "ked/digits", "ked/cifar10"
_LENGTHS = {_CIFAR10: "no: KED gains more in three times the epochs"}
"""What a longer training of an experiment shows (docs/results/training-length.md)."""


def _ked(experiment: str, point: str, what: str, paper: int = 0) -> Difference:
    candidate, baseline = f"ked {point}", f"kd {point}"
    what = f"KED minus KD, {what}, accuracy"
    return Difference(
        what,
        experiment,
        candidate,
        baseline,
        paper=paper,
        differs=("method.mu",),
        converged=_LENGTHS.get(experiment, Difference.converged),
    )


CLAIMS = (
    Claim(
        title="Students: KED is better than KD",
        reported="KED is better on CIFAR-100, CIFAR-10, Tiny ImageNet, MNIST and FashionMNIST.",
        recipes=(
            "ked/cifar100",
            "ked/tiny_imagenet",
            "ked/cifar10_cnn",
            "ked/mnist",
            "ked/mnist_full",
            "ked/fashion_mnist",
            "ked/fashion_mnist_full",
        ),
        missing="only two CPU cores were available, and of the sets only a lossy copy of CIFAR-10.",
        small=(_DIGITS, _CIFAR10),
        here=(
            *(
                _ked(_DIGITS, f"shots={n}", f"handwritten digits, {n} images per class", 1)
                for n in (2, 5, 10, 25)
            ),
            *(
                _ked(_CIFAR10, f"shots={n}", f"CIFAR-10, perceptrons, {n} images per class", 1)
                for n in (25, 100)
            ),
            Difference(
                "explanations of other records minus KD, CIFAR-10, 100 images per class, accuracy",
                _CIFAR10,
                "ked_shuffled shots=100",
                "kd shots=100",
            ),
            Difference(
                "noise in place of explanations minus KD, CIFAR-10, 100 images per class, accuracy",
                _CIFAR10,
                "ked_noise shots=100",
                "kd shots=100",
            ),
        ),
    ),
    Claim(
        title="Chimeric sets help when training data are limited",
        reported="a student learns more from few images with chimeras (numbers not seen by us).",
        here=(
            *(
                Difference(
                    f"{what}, {of}, accuracy",
                    experiment,
                    f"{variant} {point}",
                    f"{other} {point}",
                    paper=int(variant == "ked_chimeras" and other == "ked"),
                    differs=("method.chimera_fraction",),
                )
                for experiment, point, of in (
                    (_DIGITS, "shots=5", "digits, 5 images per class"),
                    (_CIFAR10, "shots=100", "CIFAR-10, 100 images per class"),
                )
                for what, variant, other in (
                    ("KED with chimeras minus KED", "ked_chimeras", "ked"),
                    ("KD with chimeras minus KD", "kd_chimeras", "kd"),
                    ("KED with chimeras minus KD with chimeras", "ked_chimeras", "kd_chimeras"),
                )
            ),
            "the variants are `kd_chimeras` and `ked_chimeras` of `ked/digits` and "
            "`ked/cifar10`, whose commands are above",
        ),
    ),
    Claim(
        title="KED with FitNet is better than KD with FitNet",
        reported="KED + FitNet above KD + FitNet on CIFAR-100 and Tiny ImageNet.",
        small=(),
        here=(
            Difference(
                "KED with FitNet minus KD with FitNet, digits, 5 images per class, hint of weight 1",
                "ked/digits_hint",
                "ked_fitnet shots=5 lambda_hint=1",
                "kd_fitnet shots=5 lambda_hint=1",
                paper=1,
                differs=("method.mu",),
            ),
            Difference(
                "KED with FitNet minus KED, the same",
                "ked/digits_hint",
                "ked_fitnet shots=5 lambda_hint=1",
                "ked_fitnet shots=5 lambda_hint=0",
            ),
            Difference(
                "KED with FitNet minus KD with FitNet, CIFAR-10, 100 images per class",
                _CIFAR10,
                "ked_fitnet shots=100",
                "kd_fitnet shots=100",
                paper=1,
                differs=("method.mu",),
            ),
            Difference(
                "KED with FitNet minus KED, the same",
                _CIFAR10,
                "ked_fitnet shots=100",
                "ked shots=100",
            ),
            "the commands are the last two of ked/digits above, and those of ked/cifar10; "
            "variants `kd_fitnet` and `ked_fitnet` of `ked/digits`, "
            "`ked/cifar10` and the recipes at full size",
        ),
    ),
    Claim(
        title="The trade-off over the number M of superfeatures, from 1 to 16",
        reported="more superfeatures explain in more detail and cost accuracy.",
        recipes=(
            "ked/digits_teachers",
            "ked/digits_levels",
            "ked/cifar10_teachers",
            "ked/cifar10_levels",
        ),
        here=(
            *(
                Difference(
                    f"explaining teacher with M = {n} minus M = 1, digits, equal parameters, accuracy",
                    "ked/digits_teachers",
                    f"found superfeatures={n}",
                    "found superfeatures=1",
                    paper=-1,
                    differs=("student.superfeatures",),
                )
                for n in (2, 4, 8, 16)
            ),
            *(
                Difference(
                    f"the same, M = {n} minus M = 1, CIFAR-10",
                    "ked/cifar10_teachers",
                    f"found superfeatures={n}",
                    "found superfeatures=1",
                    paper=-1,
                    differs=("student.superfeatures",),
                )
                for n in (2, 4, 8, 16)
            ),
            *(
                _ked("ked/digits_levels", f"superfeatures={n}", f"digits, students of M = {n}")
                for n in (1, 2, 4, 8)
            ),
            *(
                _ked(
                    "ked/cifar10_levels",
                    f"superfeatures={n}",
                    f"CIFAR-10, 100 images per class, students of M = {n}",
                )
                for n in (1, 2, 4, 8)
            ),
        ),
    ),
    Claim(
        title="A teacher trained anew at each M",
        reported="not seen by us (whether the teachers of its sweep over M were trained anew or summed).",
        recipes=("ked/digits_retrained",),
        here=tuple(
            Difference(
                f"KED minus KD, digits, teachers and students of M = {n}, accuracy",
                "ked/digits_retrained",
                f"ked_m{n}",
                f"kd_m{n}",
                paper=0,
            )
            for n in (1, 2, 4, 8)
        ),
    ),
    Claim(
        title="Weights of the loss: mu, tau and lambda",
        reported="values not seen by us.",
        recipes=("ked/digits_weights", "ked/cifar10_weights"),
        here=(
            Difference(
                "KED at mu = 1 minus mu = 0.5, digits, 5 images per class, accuracy",
                "ked/digits_weights",
                "ked mu=1",
                "ked mu=0.5",
            ),
            Difference(
                "KED minus KD, both at tau = 8 (KD's highest mean on the test split, at the edge of the grid)",
                "ked/digits_weights_tau",
                "ked tau=8",
                "kd tau=8",
            ),
            Difference(
                "KED at mu = 1 minus mu = 0.5, CIFAR-10, 100 images per class, accuracy",
                "ked/cifar10_weights",
                "ked mu=1",
                "ked mu=0.5",
            ),
            Difference(
                "KED minus KD, both at tau = 4 (KD's highest mean on the test split), CIFAR-10, 100 images per class",
                "ked/cifar10_weights_tau",
                "ked tau=4",
                "kd tau=4",
            ),
            "all values are in [KED](../../pipeline/permafrost_papers/ked/experiments/results.md#results-of-ked)",
        ),
    ),
    Claim(
        title="Found superfeatures against random ones",
        reported="not seen by us (a comparison of students).",
        recipes=("ked/cifar10_groups",),
        here=(
            Difference(
                "KED students: found minus random superfeatures, CIFAR-10, 100 images per class, accuracy",
                "ked/cifar10_groups",
                "ked_found",
                "ked_random_0",
            ),
            Difference(
                "the same, the second draw", "ked/cifar10_groups", "ked_found", "ked_random_1"
            ),
            Difference(
                "teachers: found minus random superfeatures (the first of two draws), CIFAR-10, M = 8, accuracy",
                "ked/cifar10_teachers",
                "found superfeatures=8",
                "random_0 superfeatures=8",
            ),
            Difference(
                "teachers: found superfeatures minus contiguous blocks, CIFAR-10, M = 8, accuracy",
                "ked/cifar10_teachers",
                "found superfeatures=8",
                "contiguous superfeatures=8",
            ),
            "each grouping of students has one teacher, so these intervals do not contain the spread of teachers",
        ),
    ),
    Claim(
        title="Superfeatures in a trunk: cells, channels, and other networks",
        reported="superfeatures of a CNN are groups of a feature extractor's outputs. Which ones are grouped was "
        "not seen by us.",
        recipes=("ked/cifar10_trunk", "ked/cifar10_channels", "ked/cifar10_other_trunks"),
        here=(
            Difference(
                "KED minus KD, ResNet-8 with eight heads on cells, 50 images per class, accuracy",
                "ked/cifar10_trunk",
                "ked",
                "kd",
                paper=1,
                differs=("method.mu",),
            ),
            Difference(
                "KED minus e2KD (lambda 50, its highest mean on the test split and the last weight that was run), the "
                "same students, accuracy",
                "ked/cifar10_trunk",
                "ked",
                "e2kd_map50",
            ),
            Difference(
                "KED minus KD, the same with groups of channels",
                "ked/cifar10_channels",
                "ked",
                "kd",
                paper=1,
                differs=("method.mu",),
            ),
            Difference(
                "KED minus e2KD (lambda 10, its highest mean on the test split), groups of channels",
                "ked/cifar10_channels",
                "ked",
                "e2kd_map10",
            ),
            Difference(
                "KED minus e2KD (lambda 25), groups of channels",
                "ked/cifar10_channels",
                "ked",
                "e2kd_map25",
            ),
            "trunks of torchvision and timm were not run yet",
        ),
    ),
    Claim(
        title="Tables",
        recipes=("ked/unicauca",),
        missing="the file needs an account at Kaggle and is 10 GB.",
        small=("ked/wine", "ked/breast_cancer"),
        here=(
            *(_ked("ked/wine", f"shots={n}", f"wine, {n} rows per class", 1) for n in (2, 5, 10)),
            *(
                _ked("ked/breast_cancer", f"shots={n}", f"breast cancer, {n} rows per class", 1)
                for n in (5, 20)
            ),
        ),
    ),
)
