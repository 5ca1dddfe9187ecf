"""What pic-rag costs and saves: latency, memory and break-even, beside what users would pick instead."""
