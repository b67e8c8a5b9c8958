import importlib
import pkgutil

import pytest

PACKAGES = (
    "overparam.models",
    "overparam.compress.depth",
    "overparam.compress.distill",
    "overparam.compress.experts",
    "overparam.compress.quantize",
)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_gives_every_name_that_it_offers_and_no_other(name):
    package = importlib.import_module(name)
    assert all(getattr(package, each) is not None for each in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'lost'"):
        _ = package.lost


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_hides_a_name_that_its_package_offers(name):
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules & set(package.__all__) == set()
