from model_fixtures import real_data  # noqa: F401
from one_thread import one_thread  # noqa: F401
from page_fixtures import charts_drawn_once  # noqa: F401
