import logging

from portico import logs

logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
detach = logs.attach()
