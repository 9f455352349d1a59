"""A LangGraph graph with a model, tools and checkpoints in memory: `rethaw run examples/guides/langgraph/agent.py`"""

from typing import Any

import rethaw
from rethaw import Context, Image

IMAGE = Image.debian().pip_install("langgraph==1.2.24", "langchain-openai==1.7.4").env(LANGSMITH_TRACING="false")


@rethaw.agent(image=IMAGE)
def clerk(
    ctx: Context, goal: str = "How many apples and pears are there together?", model: str = "gpt-5-mini"
) -> dict[str, Any]:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    stock = {"apples": 17, "pears": 25}
    looked: list[str] = []  # in memory only, as the graph's checkpoints are

    @tool
    def in_stock(fruit: str) -> int:
        """How many pieces of a fruit there are."""
        looked.append(fruit)
        return stock.get(fruit, 0)

    chat = ChatOpenAI(model=model, streaming=True).bind_tools([in_stock])

    def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [chat.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("ask", ask)
    builder.add_node("tools", ToolNode([in_stock]))
    builder.add_edge(START, "ask")
    builder.add_conditional_edges("ask", tools_condition)
    builder.add_edge("tools", "ask")
    graph = builder.compile(checkpointer=InMemorySaver())

    thread: Any = {"configurable": {"thread_id": "1"}}
    for update in graph.stream({"messages": [{"role": "user", "content": goal}]}, thread, stream_mode="updates"):
        print(" ".join(update), flush=True)
    return {
        "answer": graph.get_state(thread).values["messages"][-1].content,
        "looked": looked,
        "checkpoints": len(list(graph.get_state_history(thread))),
    }
