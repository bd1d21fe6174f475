from tests.conftest import one_thread  # noqa: F401, a fixture that holds for every test here
