#pragma once
#include "coatrt/bundle.hpp"
#include "coatrt/error.hpp"
#include "coatrt/session.hpp"
#include "coatrt/tokenizer.hpp"
