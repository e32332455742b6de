"""Recovery data in Python: ``mp.data.select(...)``, ``mp.data.dialogues(...)`` and so on.

Keywords are the options of the commands with the same names.
"""

from minipuzzle.workflows.data.selecting import blend as blend
from minipuzzle.workflows.data.selecting import buckets as buckets
from minipuzzle.workflows.data.selecting import dedup as dedup
from minipuzzle.workflows.data.selecting import label as label
from minipuzzle.workflows.data.selecting import select as select
from minipuzzle.workflows.data.selecting import train_quality as train_quality
from minipuzzle.workflows.data.status import status as status
from minipuzzle.workflows.data.writing import dialogues as dialogues
from minipuzzle.workflows.data.writing import instruct as instruct
from minipuzzle.workflows.data.writing import preferences as preferences
from minipuzzle.workflows.data.writing import revise as revise
from minipuzzle.workflows.data.writing import reward as reward
from minipuzzle.workflows.data.writing import rewrite as rewrite
