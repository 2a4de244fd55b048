"""Before notebooks are compared: render the embedded clips, so that no progress bar is printed."""

from bevt_lib import synthetic


def pytest_configure(config):
    synthetic.render()
