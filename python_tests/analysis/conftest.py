from model_fixtures import real_data  # noqa: F401
from one_thread import one_thread  # noqa: F401
