"""Who answers: the student, or where it is unsure of its first tokens, the teacher.

The student writes its first tokens, which nobody is sent; where their log-probabilities are high
enough it answers as without a teacher, and llama.cpp still has prompt and tokens in its slot's
cache. Else the teacher is asked, and the student's slot is free meanwhile. Whatever keeps the
teacher from answering (slow, down, over its budget, left alone after failures), the student
answers; where the student's process is gone, or ends before a client has any of its answer, the
teacher is asked instead.
"""

from __future__ import annotations

import json

from compress.serve.asked import Asked, Refusal
from compress.serve.metrics import Metrics
from compress.serve.reply import Reply
from compress.serve.slots import Slot
from compress.serve.student import Probe, Student, Tokens
from compress.serve.teacher import Answer, Teacher, Unavailable

GONE = ("model_not_ready", "backend_ended")  # codes of a student that is not there


class Cascade:
    """A student with a teacher behind it."""

    def __init__(self, student: Student, teacher: Teacher, metrics: Metrics) -> None:
        self.student, self.teacher, self.metrics = student, teacher, metrics
        self.rule = teacher.settings.rule

    async def answer(self, asked: Asked, reply: Reply, slot: Slot) -> None:
        """Answers a request that holds a slot. Refusal: neither model can."""
        entry = reply.entry
        try:
            probe = await self.student.probe(asked, self.rule.tokens)
        except Refusal as refusal:
            if refusal.code not in GONE:
                raise
            await self._instead_of_student(asked, reply, refusal)
            return

        # What is believed is written to its end, unless it ended already.
        if self.rule.believes(probe.logprobs):
            entry.why = "sure"
            try:
                await self._student(asked, reply, probe)
            except Refusal as refusal:
                if refusal.code not in GONE or reply.response is not None:
                    raise  # of a stream the client has a beginning
                await self._instead_of_student(asked, reply, refusal)
            return
        slot.give_back()
        try:
            answer = await self.teacher.answer(asked)
        except Unavailable as unavailable:
            entry.why = unavailable.why
            self.metrics.teacher_failures.labels(unavailable.why).inc()
            await slot.take()
            await self._student(asked, reply, probe)
            return
        entry.why = "unsure"
        self.metrics.used("student", *probe.tokens)
        await self._teacher(answer, asked, reply)

    async def _student(self, asked: Asked, reply: Reply, probe: Probe) -> None:
        """The student's answer, behind what it wrote already."""
        reply.entry.by = "student"
        if probe.body is not None and not asked.stream:
            reply.entry.prompt_tokens, reply.entry.answer_tokens = probe.tokens
            reply.whole(json.dumps(probe.body).encode())
            return
        self.metrics.used("student", *Tokens(0, probe.tokens.answer))
        await self.student.answer(asked, reply)

    async def _teacher(self, answer: Answer, asked: Asked, reply: Reply) -> None:
        """The teacher's answer."""
        reply.entry.by = "teacher"
        reply.entry.prompt_tokens, reply.entry.answer_tokens = answer.tokens
        if asked.stream:
            await reply.piece(answer.body)
            await reply.end()
        else:
            reply.whole(answer.body)

    async def _instead_of_student(self, asked: Asked, reply: Reply, refusal: Refusal) -> None:
        """The teacher's answer to what the student was to answer. Its `refusal` where there is
        none.
        """
        try:
            answer = await self.teacher.answer(asked)
        except Unavailable as unavailable:
            self.metrics.teacher_failures.labels(unavailable.why).inc()
            raise refusal from unavailable
        reply.entry.why = "student_gone"
        await self._teacher(answer, asked, reply)
