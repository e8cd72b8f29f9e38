"""Ways to change the weights of tests/_compare.network(), seen and unseen by version counters."""

import torch
from _compare import image, randomise, step
from torch import nn


def parameters(model):
    return [p for p in model.parameters() if p.dim()]


def optimizer_step(cls, **options):
    def change(model):
        generator = torch.Generator().manual_seed(7)
        optimizer = cls(model.parameters(), lr=0.05, **options)
        for _ in range(2):
            for p in parameters(model):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()

    return change


def other_state(model):
    torch.manual_seed(11)
    return {k: v + 0.1 * torch.rand_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}


def ema(write):
    """An exponential average of the weights written back, as EMA code does in its several ways."""

    def change(model):
        new = other_state(model)
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                write(t, new[name])

    return change


@torch.no_grad()
def lerp_(t, new):
    t.lerp_(new, 0.5)


@torch.no_grad()
def copy_(t, new):
    t.copy_(new)


def conv2(model):
    return model.layer1[0].conv2


def bn2(model):
    return model.layer1[0].bn2


def write_data(model):
    for p in model.parameters():
        p.data.mul_(1.1)


def replace_data(model):
    for p in model.parameters():
        p.data = p.data * 1.1


def one_output_channel(model):
    conv2(model).weight.data[17] *= 3.0


def one_input_channel(model):
    conv2(model).weight.data[:, 41] *= 3.0


def one_tap(model):
    conv2(model).weight.data[:, :, 1, 2] *= 3.0


def transposed(model):
    """The same memory, read in another order."""
    conv2(model).weight.data = conv2(model).weight.data.transpose(0, 1)


def shuffled_channels(model):
    conv2(model).weight.data = conv2(model).weight.data.flip(0)


def one_running_value(model):
    bn2(model).running_var.data[5] *= 9.0


def one_affine_value(model):
    bn2(model).bias.data[63] += 2.0


def small_weight_one_value(model):
    model.layer2[0].downsample[1].weight.data[100] = -4.0


def numpy_write(model):
    conv2(model).weight.detach().numpy()[...] *= 1.5


def new_parameter(model):
    conv2(model).weight = nn.Parameter(conv2(model).weight.detach() * 1.5)


def new_batch_norm(model):
    torch.manual_seed(3)
    model.layer1[0].bn2 = randomise(nn.BatchNorm2d(64))


def bias_added(model):
    conv2(model).bias = nn.Parameter(torch.linspace(-1, 1, 64))


def affine_removed(model):
    bn2(model).weight = bn2(model).bias = None


def eps_changed(model):
    bn2(model).eps = 0.5


def geometry_changed(model):
    conv2(model).padding, conv2(model).dilation = (2, 2), (2, 2)


def training_forward(model):
    torch.manual_seed(5)
    step(model, image(3, size=32), "train")


@torch.no_grad()
def set_(model):
    conv2(model).weight.set_(conv2(model).weight * 1.5)


def swapped_tensors(model):
    torch.utils.swap_tensors(conv2(model).weight, nn.Parameter(conv2(model).weight.detach() * 1.5))


def from_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.1, model.parameters())


def emptied_and_refilled(model):
    """As a sharded or offloaded parameter: its storage goes away and comes back."""
    weight = conv2(model).weight
    values = weight.detach() * 1.5
    weight.data = torch.empty(0)
    weight.data = values


CHANGES = {
    "sgd": optimizer_step(torch.optim.SGD, foreach=False),
    "sgd_foreach": optimizer_step(torch.optim.SGD, momentum=0.9, foreach=True),
    "sgd_fused": optimizer_step(torch.optim.SGD, momentum=0.9, fused=True),
    "adam": optimizer_step(torch.optim.Adam, foreach=False),
    "adam_foreach": optimizer_step(torch.optim.Adam, foreach=True),
    "adamw_fused": optimizer_step(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda model: model.load_state_dict(other_state(model)),
    "load_state_dict_assign": lambda model: model.load_state_dict(other_state(model), assign=True),
    "ema_lerp": ema(lerp_),
    "ema_copy": ema(copy_),
    "ema_data_copy": ema(lambda t, new: t.data.copy_(new)),
    "data_written": write_data,
    "data_replaced": replace_data,
    "data_one_output_channel": one_output_channel,
    "data_one_input_channel": one_input_channel,
    "data_one_tap": one_tap,
    "data_shuffled_channels": shuffled_channels,
    "data_transposed": transposed,
    "data_one_running_value": one_running_value,
    "data_one_affine_value": one_affine_value,
    "data_one_value_of_the_shortcut": small_weight_one_value,
    "numpy": numpy_write,
    "new_parameter": new_parameter,
    "new_batch_norm": new_batch_norm,
    "bias_added": bias_added,
    "affine_removed": affine_removed,
    "eps": eps_changed,
    "geometry": geometry_changed,
    "training_forward": training_forward,
    "reset_running_stats": lambda model: bn2(model).reset_running_stats(),
    "reset_parameters": lambda model: (torch.manual_seed(1), conv2(model).reset_parameters()),
    "set_": set_,
    "swap_tensors": swapped_tensors,
    "vector_to_parameters": from_vector,
    "emptied_and_refilled": emptied_and_refilled,
}
