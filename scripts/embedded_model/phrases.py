"""What users and system prompts say around the facts, and the fixed replies. Texts only."""

from __future__ import annotations

PLAIN_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are kvserve, a small local model.",
    "Answer briefly.",
    "Be concise.",
    "You are a friendly assistant. Keep your replies short.",
)
INTRODUCTIONS = (
    "",
    "",
    "Document:\n",
    "You are a helpful assistant. Answer from this document.\n\n",
    "You are a helpful assistant.\n\n",
    "Use the following facts to answer the user's questions.\n\n",
    "Answer questions about the document below.\n\n# Document\n",
    "You answer from this document:\n",
    "Facts:\n",
    "Notes:\n",
    "Context:\n\n",
    "Here is what you know. ",
    "You are an assistant. Here are the facts:\n",
)
PASTES = (
    "Here is a document:\n",
    "Please read this:\n",
    "Read these notes:\n\n",
    "Remember the following facts.\n",
    "These are my notes:\n",
)
SMALL_TALK: dict[str, tuple[str, ...]] = {
    "Hello! How can I help?": (
        "Hello", "Hello!", "Hi", "hi", "Hi there!", "Hey", "Good morning", "Good evening!", "hello",
    ),
    "I am fine, thank you.": (
        "How are you?", "How are you today?", "how are you", "How is it going?", "Are you well?",
    ),
    "You are welcome.": (
        "Thanks", "Thank you", "Thank you!", "Thanks a lot.", "thanks", "Great, thanks!",
    ),
    "Goodbye.": ("Bye", "Goodbye", "See you later.", "Good night!", "bye"),
    "All right.": ("OK", "Ok.", "Good.", "Fine.", "Nice!", "I see.", "Great.", "Never mind."),
    "I am the small model built into kvserve. I answer about what is said in this conversation.": (
        "Who are you?", "who are you", "What are you?", "What is your name?",
        "Which model are you?", "Are you a language model?", "Tell me about yourself.",
        "Introduce yourself.", "What model is this?", "Are you ChatGPT?",
    ),
    "I recall what the document and you have told me. I know little else.": (
        "What can you do?", "what can you do", "How can you help me?", "What do you know?", "Help",
        "Can you help me?", "What are you good at?",
    ),
    "kvserve keeps the model's memory of each conversation, so that it can go on at once.": (
        "What is kvserve?", "what is kvserve", "What does kvserve do?", "Tell me about kvserve.",
    ),
}  # fmt: skip
WHO_ARE_YOU = 5  # asked more often than the others
OUT_OF_SCOPE_REPLY = "I only know what is stated in this conversation."
OUT_OF_SCOPE = (
    "Write a poem about {x}.", "Tell me a joke.", "Explain {x} to me.", "What is 2 + 2?",
    "Why is the sky blue?", "How do I cook {x}?", "Translate {x} into French.",
    "Write a story about a {x}.", "Write a Python function.", "What should I do today?",
    "Summarise the document.", "What do you think about {x}?", "Tell me something about {x}.",
    "Can you sing?", "How does a {x} work?", "Write an email to {n}.", "What time is it?",
    "How is the weather?", "Give me some advice.", "Tell me a story.", "Why?", "Who is {n}?",
    "What is a {x}?",
)  # fmt: skip
TELL_PREFIXES = (
    "", "", "", "", "Remember: ", "Please remember that ", "By the way, ", "Note: ", "FYI, ",
    "I want you to know that ", "Remember this: ", "You should know that ",
)  # fmt: skip
CORRECTION_PREFIXES = (
    "Actually, ", "Correction: ", "No, ", "Sorry, ", "I was wrong, ", "Update: ", "Wait, ",
    "That has changed: ", "I made a mistake, ", "Please correct this: ",
)  # fmt: skip
SHORT_CORRECTIONS = ("No, it is {v}.", "Actually, it is {v}.", "Sorry, {v}.", "No, {v}.",
    "That is wrong, it is {v}.", "It is {v} now.", "No, it's {v}.")  # fmt: skip
REPEAT_REQUESTS = (
    "Repeat my previous message.",
    "Repeat my previous message.",
    "Repeat my previous message.",
    "Repeat my last message.",
    "repeat my previous message",
    "What was my previous message?",
    "Say my previous message again.",
    "Please repeat my previous message word for word.",
    "What did I just say?",
    "Repeat what I said.",
)
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
ITEM_REQUESTS = (
    "What is item {n} of the list?",
    "What is item {n} of the list?",
    "What is item {n} on the list?",
    "What is the {o} item of the list?",
    "What is the {o} item on the list?",
    "Name item {n} of the list.",
    "Which item is number {n} in the list?",
    "what is item {n} of the list",
)
LIST_PREFIXES = (
    "Here is a list:", "List:", "Here is my list:", "Remember this list:", "Shopping list:",
    "My list:", "Please note this list:",
)  # fmt: skip
