import shutil


def test_it(tiny_bundle):
    shutil.rmtree("/tmp/cppserve/tiny", ignore_errors=True)
    shutil.copytree(tiny_bundle, "/tmp/cppserve/tiny")
