"""An error in a fused block says where in the model the block is, and is otherwise the error it was."""

import copy
import pickle
import threading
import traceback

import pytest
import torch
from torch import nn

import fastres
from fastres import error_notes
from fastres.nn import AddAct, BnAct2d, ConvBnAct2d


def model():
    torch.manual_seed(0)
    return fastres.models.resnet18(num_classes=3)


def error_of(function, *args):
    with pytest.raises(Exception) as info:
        function(*args)
    return info.value


def image(*shape):
    return torch.randn(*shape)


def broken(net):
    net.layer2[1].conv2 = nn.Conv2d(7, 128, 3, padding=1)
    return net


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_path_of_the_block_and_eagers_error(training, fused):
    net = broken(model()).train(training)
    if not fused:
        fastres.unfuse_(net)
    error = error_of(net, image(2, 3, 32, 32))
    assert type(error) is RuntimeError and str(error).startswith("Given groups=1, weight of size [128, 7, 3, 3]")
    assert getattr(error, "__notes__", []) == (["in layer2.1 (BasicBlock), fused by fastres"] if fused else [])


def test_arguments_of_the_error_stay():
    """One value a channel: ValueError, raised by our own check."""
    net = model().train()
    error = error_of(net, image(1, 3, 32, 32))
    assert (
        type(error) is ValueError
        and error.args == error_of(fastres.unfuse_(copy.deepcopy(net)), image(1, 3, 32, 32)).args
    )
    assert error.__notes__ == ["in layer4.0 (BasicBlock), fused by fastres"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_path_is_where_the_block_is_now():
    """Moved, put into another model, copied: the name is looked up when the error happens."""
    blocks = model().layer2
    holder = nn.ModuleDict({"trunk": nn.Sequential(nn.Conv2d(3, 64, 1), copy.deepcopy(blocks))})
    holder["trunk"][1][1].conv1 = nn.Conv2d(5, 128, 1)
    outer = nn.Sequential(nn.Identity(), holder["trunk"])
    error = error_of(outer, image(2, 3, 16, 16))
    assert error.__notes__ == ["in 1.1.1 (BasicBlock), fused by fastres"]
    error = error_of(holder["trunk"], image(2, 3, 16, 16))
    assert error.__notes__ == ["in 1.1 (BasicBlock), fused by fastres"]


def test_block_alone_and_network_itself():
    net = model()
    assert error_of(net.layer1[0], image(2, 5, 8, 8)).__notes__ == ["in the model (BasicBlock), fused by fastres"]
    assert error_of(net, image(2, 5, 32, 32)).__notes__ == ["in the model (ResNet), fused by fastres"]


def test_preactivation_and_plain_networks():
    for name, block in (("resnet20_v2", "PreActBasicBlock"), ("plain20", "PlainBasicBlock")):
        net = fastres.models.create_model(name)
        net.layer2[0].conv2 = nn.Conv2d(7, 32, 3, padding=1)
        assert error_of(net, image(2, 3, 32, 32)).__notes__ == [f"in layer2.0 ({block}), fused by fastres"]


@pytest.mark.parametrize(
    "module", [BnAct2d(nn.BatchNorm2d(3)), ConvBnAct2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))], ids=["bn", "conv"]
)
def test_modules_of_ones_own(module):
    error = error_of(nn.Sequential(nn.Identity(), module), image(2, 5, 8, 8))
    assert error.__notes__ == [f"in 1 ({type(module).__name__}), fused by fastres"]
    assert error_of(AddAct(), image(1, 2, 3, 3), image(1, 2, 4, 4)).__notes__[0].startswith("in the model (AddAct)")


def test_other_notes_stay_and_one_is_enough():
    """A hook of the user's that raises has its own note; an error that passes two fused modules gets one of ours."""
    net = model()

    def hook(module, args):
        error = KeyError("mine")
        error.__notes__ = ["a note"]
        raise error

    net.layer1[0].conv1.register_forward_pre_hook(hook)
    error = error_of(net, image(2, 3, 32, 32))
    assert error.args == ("mine",) and error.__notes__ == ["a note", "in layer1.0 (BasicBlock), fused by fastres"]


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="Python 3.10's tracebacks show no notes")
def test_traceback_shows_it():
    text = "".join(traceback.format_exception(error_of(broken(model()), image(2, 3, 32, 32))))
    assert text.rstrip().endswith("in layer2.1 (BasicBlock), fused by fastres")


def test_threads_do_not_see_each_others_calls():
    nets = [broken(model()), nn.Sequential(broken(model()))]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: error_of(nets[i], image(2, 3, 32, 32)).__notes__}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0][0].split()[1], found[1][0].split()[1]] == ["layer2.1", "0.layer2.1"]


def test_keyboard_interrupts_pass_untouched():
    class Interrupting(nn.Module):
        @error_notes.named
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as info:
        Interrupting()(None)
    assert not hasattr(info.value, "__notes__")


def test_fx_still_traces():
    traced = torch.fx.symbolic_trace(model().layer1[0].eval())
    assert any(node.op == "call_module" and node.target == "conv1" for node in traced.graph.nodes)
