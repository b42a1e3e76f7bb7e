"""Scripts around checkpoints: conversion both ways, averaging, inspection."""
