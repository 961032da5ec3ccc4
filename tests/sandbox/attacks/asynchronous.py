# What ordinary asynchronous code needs still works.
# Expect: ok
import asyncio


async def main():
    await asyncio.gather(*(asyncio.sleep(0.01) for _ in range(5)))
    return 7


assert asyncio.run(main()) == 7
