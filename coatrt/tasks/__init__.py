"""Tasks: data files → examples to train on, and what is measured on held-out ones."""

from coatrt.tasks.chat import Conversation, chat_task
from coatrt.tasks.choice import Question, choice_task
from coatrt.tasks.choice_sets import ChoiceSets
from coatrt.tasks.data import TaskData
from coatrt.tasks.load import TASKS, load_task
from coatrt.tasks.text import text_task

__all__ = [
    "TASKS",
    "ChoiceSets",
    "Conversation",
    "Question",
    "TaskData",
    "chat_task",
    "choice_task",
    "load_task",
    "text_task",
]
