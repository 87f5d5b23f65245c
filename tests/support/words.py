"""Words of commands: a tiny demo set, which is that of tests/support/stores.py, and tiny networks."""

TINY_DATA = (
    *("data=demo", "data.image_size=16", "data.min_digit_size=8", "data.max_digit_size=12"),
    *("data.test_digits=10", "data.train_digits=40", "data.teacher_digits=12"),
    *("data.teacher_placements=1", "data.test_placements=1"),
)
TINY_NETWORK = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4")
TINY_TEACHER = (*TINY_NETWORK, "teacher.weights=random")
